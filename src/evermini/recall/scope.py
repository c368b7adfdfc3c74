"""Tell a question about a whole text from one whose answer stands in a few places of it.

    needs_whole("How many of the reviews are negative?")    True: every part of the text counts
    needs_whole("Who killed the butler?")                   False: there is a place to find

Decided from the question's words alone, before anything is indexed. The index's scores do not tell the two apart
(docs/log.md): a summary's words point at places, too. Made to be right when it says yes, because reading everything
costs minutes where looking up costs a second: a question that is in doubt is looked up. English, with the commonest
requests in a few other languages.
"""

from __future__ import annotations

import re

# What a text as a whole is called.
_TEXT = (
    r"(?:documents?|texts?|books?|files?|articles?|papers?|stor(?:y|ies)|novels?|plays?|"
    r"poems?|reports?|essays?|"
    r"reviews?|codes?|code ?base|programs?|modules?|scripts?|repositor(?:y|ies)|transcripts?|"
    r"conversations?|chats?|"
    r"logs?|speech(?:es)?|letters?|contracts?|manuals?|handbooks?|specs?|specifications?|"
    r"data(?: ?sets?)?|emails?|threads?|"
    r"pages?|notes?|minutes|chapters|it all|material|content)"
)
# What a text consists of or tells about, that one counts or lists.
_UNITS = (
    r"(?:reviews?|reviewers?|customers?|comments?|chapters?|sections?|paragraphs?|sentences?|"
    r"words|lines|pages|entries|"
    r"rows|records|items|tickets?|messages|emails|posts|speeches|articles|documents|files|"
    r"functions?|methods?|class(?:es)?|"
    r"variables|modules|tests|commands|errors|warnings|requests|questions|characters|people|"
    r"persons|names|places|"
    r"events|dates|years|verses|scenes|stories|examples|topics|themes|texts|letters|"
    r"participants|respondents|speakers)"
)
# Those of them that texts seldom give the number of.
_COUNTED = (
    r"(?:reviews?|reviewers?|comments?|chapters|sections|paragraphs|sentences|words|lines|"
    r"entries|rows|records|tickets?|"
    r"messages|emails|posts|speeches|functions?|methods?|classes|variables|commands|errors|"
    r"warnings|characters|verses|"
    r"scenes|examples|topics|themes|respondents|speakers)"
)
# Of these, "which ..." asks for all that a thing is true of.
_RECORDS = (
    r"(?:reviews|reviewers|comments|tickets|emails|messages|posts|letters|complaints|customers|respondents|participants|"
    r"entries|records|rows|invoices|orders|requests|functions|methods|classes|tests|modules|candidates|applicants|"
    r"speeches|sections|chapters|paragraphs|sentences|verses)"
)
_THIS = r"(?:this|the|these|those|my|our|your|that|all|both)"
_WHOLE = rf"(?:(?:whole|entire|complete|full|long|attached|given|following|above|provided|enclosed)\s+)*{_TEXT}"
_MADE = (
    r"(?:summar(?:y|ies)|synopsis|overview|outline|abstract|recap|tl;?dr|digest|gist|timeline|"
    r"chronology|glossary|"
    r"table of contents|mind ?map|read ?me|table|index|list|review|report|critique|conclusion|"
    r"assessment|"
    r"evaluation|analysis|book report|press release|blog post|presentation)"
)
_POINTS = (
    r"(?:points?|themes?|topics?|ideas?|takeaways?|take-aways?|messages?|arguments?|events?|"
    r"findings?|characters|"
    r"conclusions?|lessons?|claims?|subjects?|sections?|parts?|issues?|problems?|complaints?|"
    r"insights?|plot ?lines?|"
    r"motifs?|facts?|things?|differences|decisions?)"
)
_DO = (
    r"(?:list|name|find|enumerate|extract|collect|show|give|identify|count|get|print|write|"
    r"note|tell|provide|pull|"
    r"gather|mark|compile)"
)
_CHANGE = r"(?:change|develop|evolve|progress|shift|grow|vary|differ)(?:s|d|ed|es|ing|ops|oped)?"

_WHOLE_SIGNS = [
    # Summaries
    r"^\W*(?:please\s+|can you\s+|could you\s+|now\s+|briefly\s+)*(?:summari[sz]e|recap|"
    r"condense|shorten|abridge|outline|"
    r"sum up|paraphrase)\b(?!\s+(?:what|how|why|where|when|who)\b)",
    r"\btl;?\s?dr\b",
    r"\bin a nutshell\b|\bkey takeaways?\b|\btake-?aways?\b|\bthe gist\b|\bbig picture\b|"
    r"\bbird'?s[- ]eye\b",
    rf"\b(?:write|give|make|create|draw up|draft|produce|prepare|generate|provide|compose|"
    rf"build|compile|need|want|"
    rf"have|get)\b[^.?!]{{0,24}}?\b(?:an?|the|one|some|short|"
    rf"brief)\b[^.?!]{{0,24}}?\b{_MADE}\b(?!\s+(?:method|function|field|page))",
    rf"\b(?:main|key|central|major|principal|overarching|core|essential|recurring|common|"
    rf"most important|"
    rf"most interesting|most striking|most common|"
    rf"most frequent)\s+(?:\w+\s+)?{_POINTS}\b(?!\s+(?:between|for|to|with)\b)",
    # The text itself
    rf"\bwhat (?:is|are|was) {_THIS}?\s*{_WHOLE} (?:all )?about\b",
    rf"\bwhat (?:does|do) {_THIS} {_WHOLE} (?:do|say|contain|cover|describe|deal with|"
    rf"tell us)\s*\??$",
    rf"\b(?:whole|entire|complete) {_TEXT}\b|\bas a whole\b|\bfrom (?:beginning|"
    rf"start) to (?:end|finish)\b",
    rf"\b(?:in|throughout|across|over) (?:all|all of|each of|"
    rf"every one of) (?:of )?(?:{_THIS} )?{_WHOLE}\b",
    rf"\bthroughout {_THIS} {_WHOLE}\b",
    r"\b(?:overall|general|prevailing|predominant)\s+(?:message|tone|mood|feeling|sentiment|"
    r"impression|theme|structure|"
    r"conclusion|argument|picture|opinion|attitude|style|trend|quality)s?\b",
    r"\bover the course of\b|\bat the beginning\b.*\bat the end\b|\bthe beginning with\b.*\bend\b",
    rf"\bhow (?:does|do|did|has|have)\b.*\b{_CHANGE}\b.*\b(?:course|throughout|during|"
    rf"over time|chapters|{_TEXT})\b",
    rf"^\W*(?:please\s+|can you\s+|could you\s+)*(?:translate|proof-?read|classify|rewrite|"
    rf"re-?write|review|critique|"
    rf"refactor|evaluate|analy[sz]e|annotate|simplify|edit|correct|grade|rate|label|tag|sort|"
    rf"rank|cluster|compare|retell|"
    rf"reformat|describe|explain)\s+(?:me\s+)?(?:(?:it|them|everything)\b|(?:(?:each|every|"
    rf"all)(?: of)? )?(?:{_THIS} )?"
    rf"(?:{_WHOLE}|plot|story|structure|{_UNITS})\s*(?:[.!?,:;]|$|\b(?:in|into|as|for|by|to|"
    rf"from|on|and|or)\b))",
    r"\b(?:retell|recount|describe|explain|tell me) (?:the|its|me the) (?:whole )?(?:plot|"
    r"story|structure|architecture)\b",
    rf"\b(?:tone|mood|sentiment|style|structure|organi[sz]ation|layout|architecture|plot|"
    rf"storyline|narrative|argument|"
    rf"message|moral|purpose|quality|strengths?|weaknesses|contents?|gist|thesis|timeline|"
    rf"author'?s? (?:view|stance|"
    rf"opinion|position|intention)s?) of {_THIS} {_WHOLE}\b",
    rf"\bhow (?:is|are|was|were) {_THIS} {_WHOLE} (?:structured|organi[sz]ed|written|built|"
    rf"laid out|divided)\b",
    rf"\b(?:contradict\w*|inconsisten\w*|mistakes?|errors?|typos?|bugs?|"
    rf"anything (?:\w+ )?(?:unusual|missing|wrong|odd|"
    rf"suspicious)|red flags|repetitions?|biases|gaps) (?:in|within|across) {_THIS} {_WHOLE}\b|"
    rf"\bdo(?:es)? {_THIS} {_WHOLE} (?:contain|have|use|include) any\w*\b",
    rf"\b(?:what|which|how)\b.*\b(?:criticise|criticize|improve|make|think|feel|like|notice|"
    rf"change|learn)\b.*\b(?:of|about|"
    rf"in|from) {_THIS} {_WHOLE}\s*\??$",
    rf"\b(?:feedback|opinion|comments?|thoughts|verdict|notes) (?:on|about) {_THIS} {_WHOLE}\b|"
    rf"\bmy manuscript\b",
    r"\b(?:in|into) (?:chronological|alphabetical|reverse|the right) order\b|"
    r"\bagain and again\b|\b(?:lessons?|morals?|"
    r"conclusions?) (?:can|could|may|should) be (?:drawn|learned|learnt)\b",
    r"\bwhat (?:is|does|do|did|was) the (?:author|writer|speaker|narrator)s? (?:\w+ )?(?:try|"
    r"trying|want|mean|think|conclude|"
    r"argue|believe)\w*\b|\bthe (?:reviewers?|customers?|critics|readers) (?:like|dislike|"
    r"love|hate|think)\b",
    rf"\b(?:translate|turn|convert|transform) (?:{_THIS}(?: {_WHOLE})?|it|them|"
    rf"everything) (?:in)?to\b|\bfor and (?:which )?"
    rf"(?:\w+ )?against\b|\bdifferences between (?:{_THIS} |the two )(?:two )?{_WHOLE}\b|"
    rf"\bfull picture\b",
    rf"^\W*(?:please )?(?:list|name|identify) the most \w+ (?:{_POINTS}|dates|people|places)",
    r"\b(?:strongest|weakest|best|worst|three|five|ten|top \w+) (?:\w+ )?(?:arguments|points|"
    r"lessons|ideas|themes|insights|"
    r"quotes|moments|recommendations)\b|\bflash ?cards?\b|\b(?:quiz|exam) questions\b",
    # All of a kind
    rf"^\W*(?:please\s+|can you\s+|could you\s+|now\s+|also\s+)*{_DO}\b(?:\s+(?:me|us|out|up|"
    rf"down))?\s+"
    r"(?:a\s+(?:complete\s+|full\s+)?list\s+of\s+)?(?:all|every|each)\b",
    rf"\b(?:all|every|each)(?: of)?(?: the)?\s+(?:\w+\s+){{0,4}}(?:mentioned|named|listed|"
    rf"defined|described|used|"
    rf"occurring|appearing|introduced|quoted|cited|that (?:is|are|was|"
    rf"were)\b[^?]{{0,24}}\b(?:mentioned|named|praised|used|"
    rf"described))\b[^?]{{0,40}}(?:\banywhere\b|\b{_TEXT}\b|$|\?|\.)",
    rf"\b(?:complete|full|exhaustive) list\b|\bfor each (?:of (?:the|these) )?{_UNITS}\b",
    rf"\bclassify (?:each|every|all|the)\b|\bwhich (?:parts|sections|"
    rf"{_UNITS}) of {_THIS} {_WHOLE}\b",
    # Counts and shares
    rf"\bhow many (?:of (?:the|these|those|them|all)\b(?:\s+\w+)?|"
    rf"(?:\w+\s+){{0,2}}?{_UNITS})\b[^?]*"
    rf"(?:\bin total\b|\baltogether\b|\boverall\b|\bare there\b|\banywhere\b|"
    rf"\b(?:in|of|by|throughout) {_THIS} {_WHOLE}\b)",
    rf"\bhow many (?:of (?:the|these|those|all)(?: the| these)? |different |"
    rf"distinct )?{_COUNTED} (?:are|were|have|has|do|"
    rf"does|did|contain|mention|lack|use|complain|praise|appear|occur|speak|say|give|raise|"
    rf"return|call)\b",
    rf"\bhow (?:often|many times|frequently) (?:is|are|does|do|did|was|were)\b[^?]*\b(?:appear|"
    rf"mention(?:ed)?|"
    rf"come up|named|speak|asked|repeated|{_TEXT})\b",
    rf"\bcount (?:the|how|all|every|each)\b|\b(?:what|which) (?:share|percentage|proportion|"
    rf"fraction|number|percent) of "
    rf"(?:all |the |these |those )*{_UNITS}\b",
    # The most of a kind, in the text
    r"\b(?:complain|talk|speak|appear|come|comes|occur|discuss|mention|say|praise|"
    r"recur)\w*\b[^?]*\b(?:the )?"
    r"(?:most|least)(?: often| frequently)?(?: in (?:this|the|these) \w+)?\s*\??$",
    rf"\b(?:most|least) (?:often|frequently|frequent|commonly|mentioned)\b[^?]*(?:\b{_TEXT}\b|"
    rf"^[^?]*\bcome\b|$)",
    r"\bmost (?:often|frequently|commonly) (?:quoted|mentioned|named|used|cited|discussed|"
    r"repeated)\b|\blist them all\b",
    r"\bwhat (?:topics|themes|subjects) (?:come|are|does|do)\b",
    # The whole, in everyday words
    r"\b(?:short(?:er)?|brief|condensed|abridged|simple|plain) version\b|\blong story short\b|"
    r"\bin (?:brief|short)\s*[.?!]?$|"
    r"\bboil\w* (?:it|this|that|them|everything|the \w+) down\b|\bbullet points\b",
    r"\b(?:idea|impression|picture|sense) of what (?:this|it|the \w+) (?:is|says|covers|contains)\b|"
    r"^\W*(?:so,? )?what(?:'s| is) (?:all )?(?:this|it) (?:all )?(?:about)?\s*\??$",
    r"\bwhat (?:do|should) (?:i|we) (?:really |absolutely )?(?:need to|have to|must)? ?know\b\s*[.?!]?$|"
    r"\bwalk (?:me|us) through\b|"
    r"\bno time to read\b|\bdon'?t have (?:the )?time to read\b|\bcatch me up\b|\bbring me up to (?:speed|date)\b",
    rf"\bhow (?:is|are|was|were) (?:the|its|her|his|their) (?:\w+ )?(?:argument|plot|story|text|narrative|case|"
    rf"reasoning)s? "
    rf"(?:built|built up|constructed|structured|developed|told|made)\b|\bhow (?:does|do|did) (?:the|its|their|\w+'s) "
    rf"(?:relationship|attitude|mood|tone|view|style|character|friendship|argument|opinion)s?\b[^?]*\b{_CHANGE}\b",
    r"^\W*is the (?:author|writer|narrator|speaker|reviewer)\b|"
    r"\bwhat does the (?:author|writer|narrator|speaker) want\b|"
    r"\bfor or against\b",
    rf"\b(?:most|majority|half|none|any|some|few) of (?:the|these|those|our|my) (?:\w+ )?{_COUNTED}\b|"
    rf"\bhow many times (?:does|do|is|are)\b",
    rf"\bwhich (?:of (?:the|these|those) )?(?:\w+ )?{_RECORDS}\b(?! (?:of|in|from) (?:section|chapter|line)\b)",
    r"\bin (?:what|which) order\b|\b(?:who|what) are all\b|\ball (?:of )?the (?:people|persons|characters|names|places|"
    r"parties)\b|"
    r"\b(?:title|headline|heading|keywords?|tags?) for (?:this|it|the)\b|\bin common\b",
    rf"^\W*(?:please\s+)?(?:spot|rank|grade|order|group|categori[sz]e|flag|highlight|tally|assess|judge)\b|"
    rf"\b(?:of|about|in|for|from) (?:each|every) {_UNITS}\b|\b(?:what|tell me what|say what) each {_UNITS}\b",
    r"\b(?:which|what) (?:subjects|topics|themes|issues|questions|aspects|areas)\b[^?]*\b(?:covered|discussed|"
    r"dealt with|addressed|raised|treated|touched)\b",
    rf"\bhow many of (?:the|these|those|our|my) (?:\w+ )?{_RECORDS}\b|\bhow many (?:\w+ )?(?:{_RECORDS}|questions) "
    rf"(?:do|does|are|is|have|has)\b",
    # Other languages
    r"\bfass\w*\b.*\bzusammen\b|\bzusammenfass\w*|\büberblick über\b|\br[ée]sum(?:e[rz]?|ez|"
    r"é)\b|\bresum(?:e|ir|en|a)\b|"
    r"\bresumen\b|\briassum\w*|\bresumo\b|总结|概括|摘要|要約|요약",
]  # fmt: skip

_PLACE_SIGNS = [
    # A part of the text is named: look it up.
    r"\b(?:section|chapter|paragraph|verse|act|scene|page|line|item|clause|article|figure|table) "
    r"(?:\d+|[ivxlc]+\b|on|about|called|titled|named|[\"'`])",
    r"\b(?:function|method|class|command|option|variable|constant|endpoint|file|test|"
    r"module) [\"'`]?\w*[_.:/(]\w*",
    r"\b(?:summary|overview|outline|abstract|list|table|review|report) (?:say|mention|state|"
    r"contain|begin|end)s?\b",
    r"\baccording to the (?:summary|overview|abstract|table|review|report)\b",
]

# The text is pointed at, and nothing in it is named: what is asked is about the text.
_SELF = re.compile(
    rf"\b(?:this|these|the (?:whole|entire)) (?:\w+ )?(?:piece|passage|{_TEXT})\b", re.IGNORECASE
)
_NAMED = re.compile(
    r"(?<=[a-z,;] )[A-Z]|\d|[\"`\u201c]|\b(?:mention|say|says|said|state|states|written|published|signed|dated|"
    r"located|according|defined?|who|when|where)\b"
)

_WHOLE_RE = [re.compile(sign, re.IGNORECASE | re.DOTALL) for sign in _WHOLE_SIGNS]
_PLACE_RE = [re.compile(sign, re.IGNORECASE) for sign in _PLACE_SIGNS]
_LONGEST = 600
"""Characters of a question that are judged, from its end and from its beginning."""


def needs_whole(question: str) -> bool:
    """Return whether a question is about all of a text: a summary, a count, a complete list, a general judgement.

    Args:
        question: What is asked, without the text it is about.
    """
    text = " ".join(question.split())
    parts = [text] if len(text) <= 2 * _LONGEST else [text[:_LONGEST], text[-_LONGEST:]]
    sentences = [s for part in parts for s in re.split(r"(?<=[.?!])\s+", part) if s]
    if any(sign.search(sentence) for sentence in sentences for sign in _PLACE_RE):
        return False
    if any(sign.search(sentence) for sentence in sentences for sign in _WHOLE_RE):
        return True
    return any(_SELF.search(sentence) and not _NAMED.search(sentence) for sentence in sentences)

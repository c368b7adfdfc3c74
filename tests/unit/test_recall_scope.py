"""Which questions are about a whole text: 252 written for this, and 1,190 real ones that are not."""

from __future__ import annotations

import json

import pytest

from evermini.recall.scope import needs_whole
from tests.conftest import data_file

WHOLE = """\
Summarize this text in five sentences.
What is this document about?
Write an outline of all the sections.
How many commands are introduced in the text?
List every configuration file that is mentioned anywhere.
Give me the key takeaways.
Retell the plot in your own words.
List all characters who die.
What are the main themes of the play?
How does Hamlet's mood change over the course of the play?
How often does the ghost appear?
tl;dr
Summarise each speech in one paragraph.
What topics come up most often?
Compare the tone at the beginning with the tone at the end.
How many times is Congress asked to pass a law?
What is the overall message of these texts?
Make a table of every year that is mentioned and what happened in it.
How many of the reviews are negative?
What do customers complain about most?
What share of the reviewers would come back?
List every dish that is praised.
Classify each review as positive or negative.
Is the general feeling of these reviews good or bad?
What does this program do?
List all classes that are defined in the file.
Review this code for bugs and bad style.
Write a README for this module.
How many functions have no docstring?
Which parts of the code could be simplified?
Give an overview of the whole book.
Draw up a timeline of the events.
How many people are named altogether?
Translate the document into German.
What are the most important events, in order?
Who speaks the most in this text?
Can you give me a short summary?
Please condense the attached report to half a page.
What are the author's three strongest arguments?
How many different characters speak?
Which customers are unhappy, and why? List them all.
Draw up a table of all the parameters with their types.
Is the tone of the book hopeful or gloomy?
Put the events in chronological order.
What would you criticise about this essay?
Does the contract contain anything unusual that I should worry about?
Find all the spelling mistakes.
In how many chapters does Elizabeth appear?
What lessons can be drawn from the story?
Extract every email address.
What changed between the first and the last report?
Who is the most frequently quoted person?
Give feedback on my manuscript.
Make flash cards for all the vocabulary.
What percentage of the tickets were closed?
How are the speeches structured?
Which of the ideas come back again and again?
Describe the architecture of this code base.
Are there contradictions in the document?
Fasse den Text zusammen.
Sort the reviews into complaints and praise.
Explain the article to a ten-year-old.
Which arguments speak for and which against the reform? Give me the full picture.
Write a one-page summary for my boss.
Is this book suitable for children?
What do the reviewers like and dislike?
How many bugs were reported by each customer?
Tell me the story in three sentences.
What are the main differences between the two contracts?
List the most important dates.
Identify all the risks mentioned.
What is the author trying to tell us?
Count the number of classes.
Translate this into Spanish.
Turn these notes into minutes.
Who are the main characters and how are they related?
Give me ten quiz questions about the text.
Does the author ever change her mind?
Which words are used most often?
What is the mood of these letters?
Review my code.
Can you boil this down to three bullet points?
Give me the short version.
I don't have time to read this. What do I need to know?
What's the point of this piece?
Walk me through what happens.
Which subjects are covered, and roughly how much space does each get?
How many different people speak in this transcript?
How many times does the author apologise?
Collect every date with what happened on it.
Which of these complaints come from existing customers?
Are most of the comments positive or negative?
What fraction of the entries are errors?
Who are all the people involved?
Make me a list of the open action items.
What do these documents have in common?
Which reviewers would not recommend the product?
Pull out all quotations by the minister.
What is the prevailing mood here?
Write an executive summary for the board.
Tell me what each chapter is about.
What are the recurring complaints?
Is the author for or against the tax?
How is the argument built up?
Which functions are never called?
Give every function a one-line description.
What would be a good title for this text?
How reliable is this report as a whole?
Which emails still need an answer?
Rank the candidates that are discussed by how favourably they are described.
How many of the invoices are overdue?
In what order do the events happen?
Name each medicine that occurs, with its dose.
Spot any factual errors.
How does the relationship between the two sisters develop?
What does the writer want her readers to do?
How many questions does the interviewer ask?
Which tickets mention a refund?
Give me an idea of what this is.
""".splitlines()

PLACES = """\
Which file lists the package sources that apt uses?
How do I remove a package together with its configuration files?
What does the command dpkg -L print?
How many priorities can a package have in apt pinning by default?
Who maintains the aptitude program?
What is the difference between Depends and Recommends?
Explain what a pre-dependency is.
List the options of apt-cache search.
Who kills Polonius?
What does the ghost tell Hamlet about his death?
To whom does Polonius say: to thine own self be true?
Where is Hamlet sent by the king?
How does Ophelia die?
What is written in the letter that Hamlet sends to Horatio by the sailors?
How many gravediggers are in the churchyard scene?
Name the play that Hamlet has the actors perform.
What did Truman say about the death of Roosevelt?
In which year was the atomic bomb mentioned as a secret to be kept?
What does the president demand for the minimum wage?
Who was lieutenant of the fleet that Truman praises?
What does the speech say about unconditional surrender?
How much money is asked for veterans in the 1946 budget?
Does the president mention the price of steel?
Which countries are named as members of the Big Three?
What did the reviewer say about the pho?
Which dish had a hair in it?
What happened during the late May bank holiday?
Is there a review that mentions a Rick Steve recommendation?
Why was the customer with the potatoes unhappy?
How long did the couple wait for their drinks on Mother's Day?
What was served with the salmon?
Who recommended the place to the person who flew in from Chicago?
What does the method parse_known_args return?
Where is ArgumentError raised for a missing choice?
What is the default value of prefix_chars?
How does add_subparsers build the prog string?
Which class formats help text with default values?
What happens if nargs is zero for a store action?
Explain the function _get_positional_kwargs.
How many arguments does HelpFormatter.__init__ take?
How old was Methuselah when he died?
What did Jacob give Esau for his birthright?
Who was the father of Abraham?
How many years did Jacob serve for Rachel?
What are the names of the sons of Noah?
Why was Lot's wife punished?
What was the dream of the chief baker?
Describe the coat that Joseph received.
What is the capital of the province described in chapter two?
When did the company report its highest revenue?
How much is the fee for late payment?
Who wrote the letter to the bishop?
What does section 4.2 say about liability?
How many employees does the firm have?
Explain how the cache is invalidated.
Which function opens the socket?
What is the main reason given for the delay?
Summarize the section on warranties.
What did Anna say when she heard the news?
Is smoking allowed in the rented flat?
How often must the filter be replaced?
List the ingredients of the apple cake.
What are the side effects of the drug?
Where was the treaty signed?
Give the definition of a material breach.
Does the phone support wireless charging?
How does the protagonist meet her husband?
Compare the prices of the two hotels in Lyon.
What is the most expensive item on the menu?
Which port does the server listen on by default?
Translate the Latin motto above the door.
How many times was Charles married?
What all-time record did she break?
What is the password of the admin account?
How many people live in Ravensdon?
Which year did the war end?
Describe the accident on the bridge.
What is the name of the captain's ship?
How do I reset the device to factory settings?
What did the committee decide about the new road?
Who is responsible for paying the insurance?
List the members of the jury.
What does the constant MAX_RETRIES control?
Why did the experiment fail?
How many goals did the striker score in 1998?
Explain the difference between a lease and a licence.
What conditions must be met before a refund is paid?
Is there a discount for students?
When is the deadline for applications?
What does chapter 7 say about the king's illness?
Which medicine was given to the child?
Where does the river reach the sea?
What is the overall length of the vehicle?
When was the bridge opened to traffic?
What did Marta say to the inspector on the stairs?
Which port does the service listen on by default?
How much does the annual licence cost?
Why did the committee reject the second proposal?
What is the name of the captain's dog?
How many passengers were on board when the ferry sank?
Where can I change the time-out of a request?
Which article of the treaty regulates fishing rights?
What happens if the tenant does not pay within 14 days?
Who succeeded Ferdinand as bishop?
What was the turnover in the third quarter of 2019?
How do I reset the device to its factory settings?
Which environment variable switches the cache off?
What colour was the door of the house in Elm Street?
In which year did the author move to Berlin?
What does the error code E42 mean?
How long does the warranty last?
What reason does Elinor give for leaving?
Which two ingredients have to be mixed first?
Explain how the lock in the buffer pool works.
What is the maximum size of an attachment?
Who wrote the foreword?
Was the bill passed in the end?
What is the difference between the Basic and the Pro plan?
How many votes did the opposition get in Lower Saxony?
Where did they hide the treasure map?
What is the phone number of the clinic in Rostock?
Which class inherits from BaseHandler?
What did the doctor prescribe for the cough?
List the steps for replacing the filter.
How was the fire at the warehouse caused?
Which law does the judge cite in the Miller case?
What are the side effects of the drug in children?
How old was the witness at the time?
Summarise what the treaty says about fishing.
Is smoking allowed on the balcony?
Which hotel did the delegates stay in?
What is the salary of the deputy director?
Name the three villages that were flooded in 1953.
""".splitlines()


def test_questions_about_the_whole_text():
    missed = [question for question in WHOLE if not needs_whole(question)]
    assert len(missed) <= len(WHOLE) // 10, missed


@pytest.mark.parametrize("question", PLACES)
def test_questions_about_places(question):
    assert not needs_whole(question)


def test_real_questions_about_places():
    """Of XQuAD's questions each is answered by one sentence of one paragraph."""
    data = json.loads(data_file("xquad/xquad.en.json").read_text())["data"]
    asked = [q["question"] for d in data for p in d["paragraphs"] for q in p["qas"]]
    wrong = [question for question in asked if needs_whole(question)]
    assert len(wrong) <= len(asked) // 200, wrong


@pytest.mark.parametrize(
    ("question", "whole"),
    [
        ("", False),
        ("Hello. Please read the text.\n\nSummarize it.", True),
        ("x " * 5000 + "Give me a summary.", True),
        ("Summarise what the witness said about the car.", False),
        ("What does chapter 3 say? Summarize it.", False),
    ],
)
def test_instructions_around_the_question(question, whole):
    assert needs_whole(question) is whole

"""Evaluations of long contexts: what is found, and what is answered, against baselines in the same run.

    cases      a text with its questions, their answers and the passages that hold them
    corpus     texts to hide passages in: never repeated, of a stated length in tokens
    needles    passages of several kinds, at stated depths; look-alikes
    ruler      the thirteen tasks of RULER, generated here
    hotpot     HotpotQA in one prompt
    ifeval     IFEval: instructions that a program can check (instructions)
    systems    ways to answer a case: recall, and what it is compared with
    run        asks, scores, keeps every result at once: an interrupted run goes on where it stopped
    report     tables, heat maps, one JSON file with everything

Two things are measured apart: whether the passage was in what the model read (if not, that is retrieval's fault), and
whether the answer is right (if the passage was there and it is not, that is the model's).
"""

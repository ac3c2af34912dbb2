"""Run METEOR or SPICE of pycocoevalcap in a separate process.

pycocoevalcap waits for Java without a time limit, and never returns after an error.
:mod:`blip2.evaluation.captioning` therefore runs this file as a script, and terminates the script together with Java
after a time limit. The script reads ``[references, predictions]`` from stdin as JSON and prints the score. Each of the
two is a list that has, for every image, the list of its tokenized captions.
"""

import json
import os
import sys
import traceback
from contextlib import redirect_stdout


def main(name: str) -> None:
    references, predictions = (dict(enumerate(texts)) for texts in json.load(sys.stdin))
    try:
        with redirect_stdout(sys.stderr):
            score = (meteor if name == "METEOR" else spice)(references, predictions)
        print(score, flush=True)
    except Exception as error:
        traceback.print_exception(error, limit=0)
        sys.stderr.flush()
        os._exit(1)  # skip METEOR's destructor, which waits for a lock that an exception leaves held


def meteor(references: dict[int, list[str]], predictions: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return float(scorer.compute_score(references, predictions)[0])
    except (OSError, ValueError):  # Java's stderr may hold the reason
        scorer.meteor_p.kill()
        stderr = scorer.meteor_p.stderr
        sys.stderr.write(stderr.read().decode(errors="replace") if stderr else "")
        raise


def spice(references: dict[int, list[str]], predictions: dict[int, list[str]]) -> float:
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(references, predictions)[0])


if __name__ == "__main__":
    main(sys.argv[1])

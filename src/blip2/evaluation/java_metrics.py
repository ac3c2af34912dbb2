"""METEOR and SPICE of pycocoevalcap, each in a process of its own.

Its classes wait for Java without limit, and for ever once something went wrong. :mod:`blip2.evaluation.captioning` runs
this file, and ends it and Java when time is up. It reads [truth, written] as JSON, lists of tokenized captions for each
picture, and writes the score.
"""

import json
import os
import sys
import traceback
from contextlib import redirect_stdout


def main(name: str) -> None:
    truth, written = (dict(enumerate(texts)) for texts in json.load(sys.stdin))
    try:
        with redirect_stdout(sys.stderr):
            score = meteor(truth, written) if name == "METEOR" else spice(truth, written)
        print(score, flush=True)
    except Exception as error:
        traceback.print_exception(error, limit=0)
        sys.stderr.flush()
        os._exit(1)  # not through METEOR's destructor, which waits for a lock that an exception leaves held


def meteor(truth: dict[int, list[str]], written: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return float(scorer.compute_score(truth, written)[0])
    except (OSError, ValueError):  # Java may have said why
        scorer.meteor_p.kill()
        said = scorer.meteor_p.stderr
        sys.stderr.write(said.read().decode(errors="replace") if said else "")
        raise


def spice(truth: dict[int, list[str]], written: dict[int, list[str]]) -> float:
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(truth, written)[0])


if __name__ == "__main__":
    main(sys.argv[1])

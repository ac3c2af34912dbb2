"""Rank texts by how well they describe an image, with a stage-1 model.

python examples/03_rank_texts.py runs/demo/stage1 owl.png "An owl." "A boat." "A red car."
"""

import sys

import blip2

model, image, *texts = sys.argv[1:]
pipeline = blip2.load(model)
similarities = pipeline.similarity(image, texts)[0]  # cosine similarity (ITC): one pass per image and per text
probabilities = pipeline.match(image, texts)[0]  # probability of a match (ITM): one pass per pair, more accurate
for i in probabilities.argsort(descending=True).tolist():
    print(f"{probabilities[i]:.3f}  {similarities[i]:.3f}  {texts[i]}")

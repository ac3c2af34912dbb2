"""Answer questions about an image with a stage-2 model.

python examples/02_answer.py runs/demo/vqa owl.png "What is it?" "What color is the background?"
"""

import sys

import blip2

model, image, *questions = sys.argv[1:]
pipeline = blip2.load(model)
decoding = blip2.Decoding(num_beams=5, length_penalty=-1.0, max_new_tokens=10)  # the paper's settings for VQA
for question, answer in zip(questions, pipeline.answer(image, questions, decoding), strict=True):
    print(f"{question} {answer}")

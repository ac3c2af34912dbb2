"""Caption images with a stage-2 model.

python examples/01_caption.py runs/demo/stage2 owl.png boat.png
"""

import sys

import blip2

model, *images = sys.argv[1:]
pipeline = blip2.load(model)  # a run, a Hugging Face hub name such as Salesforce/blip2-opt-2.7b, or a LAVIS .pth file
for image, caption in zip(images, pipeline.caption(images), strict=True):
    print(f"{image}: {caption}")

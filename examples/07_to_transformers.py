"""Convert a stage-2 model to transformers' format and caption an image with transformers.

python examples/07_to_transformers.py runs/demo/stage2 converted owl.png
"""

import sys

from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blip2.convert import convert

model, folder, image = sys.argv[1:]
convert(model, folder, "transformers")

processor = Blip2Processor.from_pretrained(folder)
converted = Blip2ForConditionalGeneration.from_pretrained(folder)
inputs = processor(images=Image.open(image).convert("RGB"), text="", return_tensors="pt")
tokens = converted.generate(**inputs, num_beams=5, max_new_tokens=30)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())

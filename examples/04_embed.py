"""Write the embeddings of images to a file, then search them with a text.

python examples/04_embed.py runs/demo/stage1 embeddings.safetensors "an owl" *.png
"""

import sys

from safetensors.torch import load_file, save_file

import blip2

model, output, text, *images = sys.argv[1:]
pipeline = blip2.load(model)
save_file({"images": pipeline.embed_images(images).cpu()}, output)  # [images, queries, width], unit vectors

embeddings = load_file(output)["images"]
query = pipeline.embed_texts(text)[0].cpu()  # [width]
scores = (embeddings @ query).amax(dim=1)  # the similarity of an image is that of its best query
for i in scores.argsort(descending=True)[:5].tolist():
    print(f"{scores[i]:.3f}  {images[i]}")

"""Train stage 1 on a folder of images, each with a text file of the same name as its caption.

python examples/05_train_stage1.py photos runs/photos/stage1 --training.max_steps 2000
"""

import sys

import blip2
from blip2.recipe import find_recipe, load_recipe

folder, output, *overrides = sys.argv[1:]
recipe = load_recipe(
    find_recipe("demo-stage1"),  # a small Q-Former; a path to your own YAML file works as well
    [
        *("--data.train", folder),
        *("--data.validation", "null"),
        *("--output", output),
        *overrides,  # any key of a recipe: `blip2 train --help` lists them
    ],
)
checkpoint = blip2.train(recipe)
print(f"python examples/03_rank_texts.py {checkpoint} IMAGE TEXT ...")

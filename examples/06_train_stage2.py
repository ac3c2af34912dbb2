"""Train stage 2 on the same folder, starting from the Q-Former of stage 1.

python examples/06_train_stage2.py photos runs/photos/stage1 runs/photos/stage2 --training.max_steps 500
"""

import sys

import blip2
from blip2.recipe import find_recipe, load_recipe

folder, stage1, output, *overrides = sys.argv[1:]
recipe = load_recipe(
    find_recipe("demo-stage2"),  # the LLM is SmolLM2-135M-Instruct; --language.name replaces it
    [
        *("--data.train", folder),
        *("--data.validation", "null"),
        *("--start_from", stage1),
        *("--output", output),
        *overrides,
    ],
)
checkpoint = blip2.train(recipe)
print(f"python examples/01_caption.py {checkpoint} IMAGE ...")

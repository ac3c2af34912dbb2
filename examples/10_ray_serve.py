"""Serve models on all machines of a Ray cluster behind one address; needs ray[serve].

python examples/10_ray_serve.py runs/demo/vqa runs/demo/twins
"""

import sys

from ray import serve

import blip2

MODELS = sys.argv[1:]


def build_app():
    """Runs once in each replica, on its machine, so that the models must be there or on a hub."""
    from blip2.serve.app import create_app
    from blip2.serve.options import ServeOptions
    from blip2.serve.server import name_models

    # Ray's own queues keep requests away that this replica would refuse.
    models = {name: blip2.load(path) for name, path in name_models(MODELS).items()}
    return create_app(models, options=ServeOptions(max_queue=64))


@serve.deployment(num_replicas=2, max_ongoing_requests=32, max_queued_requests=64)
@serve.ingress(build_app)
class Blip2:
    """A replica. For replicas on GPUs: ray_actor_options={"num_gpus": 1}."""


if __name__ == "__main__":
    serve.run(Blip2.bind(), blocking=True)  # at 127.0.0.1:8000, until Ctrl-C

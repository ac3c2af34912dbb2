"""Serve models on all machines of a Ray cluster behind one address; needs ray[serve].

python examples/10_ray_serve.py runs/demo/vqa runs/demo/twins
"""

import signal
import sys

from ray import init, serve

import blip2

MODELS = sys.argv[1:]


def build_app():
    """Runs once in each replica, on its machine, so that the models must be there or on a hub."""
    from blip2.serve.app import create_app
    from blip2.serve.options import ServeOptions
    from blip2.serve.server import name_models

    models = {name: blip2.load(path) for name, path in name_models(MODELS).items()}
    return create_app(models, options=ServeOptions(max_queue=64))  # Ray keeps away what this replica would refuse


@serve.deployment(num_replicas=2, max_ongoing_requests=32, max_queued_requests=64, graceful_shutdown_timeout_s=50)
@serve.ingress(build_app)
class Blip2:
    """A replica. For replicas on GPUs: ray_actor_options={"num_gpus": 1}."""


if __name__ == "__main__":
    init()  # sets a handler of SIGTERM, which the next line replaces
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(Blip2.bind(), blocking=True)  # at 127.0.0.1:8000
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM
        serve.delete("default")  # accepts no more requests, and returns when those that have begun are answered
        serve.shutdown()

"""``POST /v1/attention``: where the queries look at an image."""

from __future__ import annotations

from fastapi import APIRouter, Request
from jaxtyping import Float
from starlette.responses import JSONResponse, Response
from torch import Tensor

from blip2.pipelines.results import to_grid
from blip2.serve.body import JSONRoute
from blip2.serve.models import Stage1Model, check_length
from blip2.serve.schemas import AttentionRequest
from blip2.serve.service import Service, text_of


def make_router(service: Service) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(route_class=JSONRoute)

    @router.post("/v1/attention")
    async def attention(body: AttentionRequest, request: Request) -> Response:
        """Return the attention of the queries over the image in the last cross-attention, as grids of numbers.

        ``queries`` has a grid for each query, and ``mean`` is their mean; each is divided by its maximum.
        """
        model = service.find_any(body.model, request)
        text = None if body.text is None else text_of(body.text, "text")
        if text is not None and isinstance(model, Stage1Model):
            check_length(model.pipeline, text, "text")
        [features] = await service.encode(model, [body.image], "image")
        [weights] = await service.engine.submit(model.attention, [(features, text)])
        grids, [mean] = _scale(to_grid(weights.float())), _scale(to_grid(weights.float().mean(dim=0, keepdim=True)))
        return JSONResponse(
            {
                "object": "attention",
                "model": model.name,
                "width": mean.shape[1],
                "height": mean.shape[0],
                "mean": [[round(each, 4) for each in row] for row in mean.tolist()],
                "queries": [[[round(each, 4) for each in row] for row in grid] for grid in grids.tolist()],
            }
        )

    return router


def _scale(grids: Float[Tensor, "Q side side"]) -> Float[Tensor, "Q side side"]:
    """Divide each grid by its maximum."""
    return grids / grids.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)

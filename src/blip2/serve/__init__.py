"""The HTTP service: OpenAI's endpoints, re-ranking, search and a web page over the pipelines of this library."""

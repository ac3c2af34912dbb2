"""Other people's checkpoints: read as this project's, and written back."""

"""The multimodal token format: text and image spans to ids and back."""

"""The multimodal token format: text and images to ids and back, packing and padding."""

"""What is computed: pure linen modules, one frozen config per model."""

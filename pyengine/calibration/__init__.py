"""What text does to a model's linears: activation statistics, and one layer step by step."""

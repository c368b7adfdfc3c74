"""Fine-tuning jobs: what clients ask for, how jobs are getting on, and the processes that do them."""

"""Fine-tuning: reads and checks training files, trains adapters. Runs in processes of its own (`__main__`)."""

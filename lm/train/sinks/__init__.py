"""Where else a run's numbers are shown: TensorBoard, wandb, trackio and MLflow, fed from the run's own files."""

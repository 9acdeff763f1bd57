"""Training on a data set: supervised fine-tuning (SFT) and generalised knowledge distillation (GKD)."""

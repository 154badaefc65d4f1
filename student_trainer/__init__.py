"""The run: prompts, rollouts, teachers' marks, the objective, the optimizer, checkpoints."""

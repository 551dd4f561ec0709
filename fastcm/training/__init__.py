"""What trains: settings, schedules, the step, the run around it.

Owns config and schedule, the flat optimizer, the method's loss, `train_step` (trainer), several processes, and a run's folder with its
checkpoints and its log.
In: a `TrainConfig`, a `Dataset`, a device, perhaps a teacher. Out: a run folder with a model folder inside, on one machine the same to the
bit however often it was interrupted. All randomness is a function of (seed, nimg). Knows nothing of a picture's file.
"""

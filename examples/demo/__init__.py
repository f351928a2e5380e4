"""The main job from end to end on one model: calibrate, factorise, train, save, reload, generate, compare."""

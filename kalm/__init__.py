"""Language-model knowledge turned into skills: KALM on CLEVR-Robot, from notebooks.

Importing `kalm` registers `kalm/ClevrRobot-v0` with Gymnasium where Gymnasium is installed; MuJoCo loads with the first `make`.
"""
__version__ = "0.1.0"

try:
    import gymnasium
except ImportError:  # a machine that only trains needs no environment
    pass
else:
    if "kalm/ClevrRobot-v0" not in gymnasium.registry:
        gymnasium.register("kalm/ClevrRobot-v0", entry_point="kalm.env:ClevrRobotEnv",
                           vector_entry_point="kalm.env:ClevrRobotVectorEnv")

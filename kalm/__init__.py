"""Language models whose knowledge becomes skills: KALM for any environment, from notebooks.

Importing `kalm` registers its environments with Gymnasium; everything else loads when it is first used."""
from importlib import import_module

__version__ = "0.2.0"

_WHERE = {name: module for module, names in {
    "kalm.core.goals": ("Goal",),
    "kalm.core.rollouts": ("Rollout", "Rollouts"),
    "kalm.core.domain": ("domain", "Behaviour", "Features", "Limits", "Words"),
    "kalm.core.gym_domain": ("GymDomain",),
    "kalm.core.minari": ("from_minari", "to_minari"),
    "kalm.core.episodes": ("collect", "evaluate", "replay", "Evaluation"),
    "kalm.lm.model": ("KalmLM", "Adapter"),
    "kalm.lm.settings": ("GroundConfig",),
    "kalm.lm.ground": ("ground",),
    "kalm.lm.imagine": ("imagine",),
    "kalm.lm.explain": ("explain", "meaning"),
    "kalm.lm.quality": ("quality",),
    "kalm.rl.replay": ("Replay",),
    "kalm.rl.bc": ("BC",),
    "kalm.rl.cql": ("CQL",),
    "kalm.rl.td3bc": ("TD3BC",),
    "kalm.rl.d3rlpy": ("OnnxPolicy", "from_d3rlpy", "to_d3rlpy"),
    "kalm.run.policies": ("load_policy",),
}.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'kalm' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


try:
    import gymnasium
except ImportError:  # a machine that only trains needs no environment
    pass
else:
    if "kalm/ClevrRobot-v0" not in gymnasium.registry:
        gymnasium.register("kalm/ClevrRobot-v0", entry_point="kalm.clevr.env:ClevrRobotEnv",
                           vector_entry_point="kalm.clevr.env:ClevrRobotVectorEnv")
    if "kalm/MetaWorld-v0" not in gymnasium.registry:
        gymnasium.register("kalm/MetaWorld-v0", entry_point="kalm.metaworld.env:MetaWorldEnv")

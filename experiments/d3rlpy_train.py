"""Train one of d3rlpy's algorithms on a file of `kalm.to_d3rlpy` and export its policy as ONNX. No kalm in here.

d3rlpy pins an older Gymnasium, so this runs in an environment of its own:

    python3 -m venv .venv-d3rlpy && .venv-d3rlpy/bin/pip install d3rlpy==2.8.1 onnx onnxscript
    .venv-d3rlpy/bin/python experiments/d3rlpy_train.py DATA.h5 POLICY.onnx DiscreteBCQ --steps 5000 --seed 0
"""

import argparse
import warnings

import torch


class Greedy(torch.nn.Module):
    "What a policy does, as a module that can be traced."
    def __init__(self, algo):
        super().__init__()
        self.algo, self.modules_ = algo, algo.impl.modules

    def forward(self, x):
        action = self.algo.impl.predict_best_action(x)
        scaler = self.algo.config.action_scaler
        return action if scaler is None else scaler.reverse_transform(action)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", help="HDF5, from kalm.to_d3rlpy")
    p.add_argument("policy", help="ONNX file to write")
    p.add_argument("algorithm", help="as d3rlpy names its classes: DiscreteBCQ, IQL, AWAC, ...")
    p.add_argument("--steps", type=int, default=5000, help="gradient steps (default 5000)")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    import d3rlpy  # not in kalm's own environment
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    d3rlpy.seed(a.seed)
    with open(a.data, "rb") as f:
        data = d3rlpy.dataset.ReplayBuffer.load(f, d3rlpy.dataset.InfiniteBuffer())
    settings = dict(batch_size=a.batch_size)
    if data.dataset_info.action_space == d3rlpy.ActionSpace.CONTINUOUS:
        settings["action_scaler"] = d3rlpy.preprocessing.MinMaxActionScaler()
    algo = getattr(d3rlpy.algos, f"{a.algorithm}Config")(**settings).create(device="cpu:0")
    algo.fit(data, n_steps=a.steps, n_steps_per_epoch=a.steps, show_progress=False,
             logger_adapter=d3rlpy.logging.NoopAdapterFactory())
    algo.impl.modules.freeze()
    example = torch.zeros(1, *data.dataset_info.observation_signature.shape[0])
    traced = torch.jit.trace(Greedy(algo), example, check_trace=False)
    torch.onnx.export(traced, (example,), a.policy, dynamo=False, input_names=["observation"], output_names=["action"],
                      dynamic_axes={"observation": {0: "n"}, "action": {0: "n"}})
    print(f"{a.algorithm}: {a.steps} steps on {data.transition_count} transitions, {a.policy}")


if __name__ == "__main__":
    main()

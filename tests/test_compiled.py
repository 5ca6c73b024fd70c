"""What torch.compile makes of the scripts: whole graphs, all of them made before the first step.

The graphs are run as they are, without Inductor, whose minutes no test should take.
"""
import numpy as np
import pytest

from util import SMALL, glyphs, run_script

COUNTED = """
import torch._dynamo.utils
compile = torch.nn.Module.compile
def as_it_is(graph, inputs):
    assert "silu" in graph.code  # what is random is drawn outside
    assert not any(word in graph.code for word in ("rand", "dropout", "bernoulli", "uniform"))
    return graph.forward
def compile_whole(module):
    compile(module, backend=as_it_is, fullgraph=True)  # a graph break is an error
monkeypatch.setattr(torch.nn.Module, "compile", compile_whole)
torch._dynamo.reset()
counters = torch._dynamo.utils.counters
counters.clear()
log = common.Log
def told(name):
    function = getattr(log, name)
    def tell(self):
        print(self.args.out_dir, name, counters["stats"]["unique_graphs"])
        function(self)
    monkeypatch.setattr(log, name, tell)
told("restart_clock"), told("close")
"""
RUN = [*SMALL, *"--batch-size 4 --micro-batch 2 --dropout 0.3 --flip --compile".split(),
       *"--workers 0 --log-every 1 --sample-every 0 --out-dir run --dataset few.npz".split()]


@pytest.mark.parametrize("script, flags, graphs", [
    ("ct.py", "--total-steps 4", 2),  # the net as student, and as target
    ("ct.py", "--objective scm --teacher none --total-steps 4", 2),  # the tangent's, in float32
    ("cd.py", "--objective continuous --no-stop-gradient --teacher ideal --total-steps 4", 1),
    ("cd.py", "--teacher ideal --mu 0.9 --total-steps 4 --gradient-checkpointing", 2),  # average
    # Net and average, with and without gradients: those of the average are of its input.
    ("ctm.py", "--teacher ideal --total-steps 6 --disc conv --disc-start 2", 4),
    # The student, and the one before.
    ("guided_distill.py", "--teacher ideal --start-N 4 --stage1-steps 2 --round-steps 1 "
     "--last-steps 1", 2)])
def test_no_graph_breaks_and_none_is_made_after_the_trial(script, flags, graphs, tmp_path):
    images, labels = glyphs(20, 0)
    np.savez(tmp_path / "few.npz", images, labels)  # the ideal teacher looks at each
    done = run_script(*RUN, *flags.split(), script=script, cwd=tmp_path, prelude=COUNTED, code=0)
    said = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    assert said == [f"run restart_clock {graphs}", f"run close {graphs}"]

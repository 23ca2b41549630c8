"""Everything that wants a GPU, in pieces of less than ten minutes that resume: `make gpu`, or `python benchmarks/gpu.py`

    python benchmarks/gpu.py                   # all that is not done yet, one piece after the other
    python benchmarks/gpu.py --minutes 9       # as many pieces as fit; the same command goes on
    python benchmarks/gpu.py --pieces speed    # some of them
    python benchmarks/gpu.py --list            # what there is, and what is done

A piece that has ended keeps what it printed in `results/gpu_….txt`, with command, versions and hardware, and is not run again; `--again` runs it anew. A piece that says 'to be continued', or that ran out of
time, is run again by the next call and goes on where it was. Without a GPU the pieces are listed. A bare machine needs PyTorch, fastai and this checkout: `PYTHONPATH=. python benchmarks/gpu.py`; where there is no
network, wheels made elsewhere by `pip download -d wheels fastai timm pytorch_optimizer torch_optimizer curvlinops-for-pytorch` are installed by `pip install --no-index --find-links wheels …`."""
import argparse,math,os,subprocess,sys,time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
results = root/'benchmarks/results'
python,cuda = [sys.executable, '-W', 'ignore'],['--device', 'cuda']
speed = [*python, 'benchmarks/speed.py', *cuda, '--rounds', '5']
pieces = dict(cuda_tests=[*python, '-m', 'pytest', '-q', '-m', 'cuda', '-n', 'auto', '--maxprocesses', '12', '--continue-on-collection-errors', 'tests'], digits=[*python, '-m', 'adahessian_fastai', '--seeds', '3'],
    speed=[*speed, '--skip', 'scale', 'products'],
    speed_compiled=[*speed, '--models', 'resnet18', '--only', 'ours paper', 'ours compiled', '--compile', '--skip', 'scale', 'products', 'budget', '--name', 'compiled'],
    speed_scale=[*speed, '--models', 'mlp', '--name', 'scale'], forum=[*python, 'benchmarks/forum.py', *cuda, '--minutes', '8'],
    resnet20=[*python, 'benchmarks/resnet20.py', '--full', *cuda, '--minutes', '8'])
limit = 590 # Seconds of a piece

def is_done(name):
    "Has the piece ended?"
    path = results/f'gpu_{name}.txt'
    if not path.exists(): return False
    head,_,said = path.read_text().partition('\n\n')
    return not head.endswith('ran out of time') and 'to be continued' not in said

def run(name, command, hardware, limit=limit):
    "Run one piece, and keep what it says with command, versions and hardware"
    start = time.perf_counter()
    def text(o): return o.decode() if isinstance(o, bytes) else o or ''
    try:
        res = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit, env={**os.environ, 'PYTHONPATH': str(root)})
        end,said = f'exit status {res.returncode}',res.stdout[-20_000:]+res.stderr[-5_000:]
    except subprocess.TimeoutExpired as e: end,said = 'ran out of time',text(e.stdout)[-20_000:]+text(e.stderr)[-5_000:]
    head = f"{' '.join(['python', *command[3:]])}\n{hardware}, {time.perf_counter()-start:.0f} s, {end}\n\n"
    (results/f'gpu_{name}.txt').write_text(head+said)
    print(head.strip(), flush=True)

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pieces', nargs='*', default=list(pieces), choices=list(pieces))
    p.add_argument('--minutes', type=float, default=math.inf, help='begin no piece after so long')
    p.add_argument('--again', action='store_true', help='run what is done too')
    p.add_argument('--list', action='store_true')
    args = p.parse_args(args)
    import torch
    here,start = torch.cuda.is_available(),time.perf_counter()
    if args.list or not here:
        if not here: print('There is no CUDA device here.')
        return print(*(f"{'done' if is_done(k) else 'to do':6} {k}: {' '.join(['python', *pieces[k][3:]])}" for k in args.pieces), sep='\n')
    for name in args.pieces:
        again = args.again
        while again or not is_done(name):
            if time.perf_counter()-start>60*args.minutes: return print('to be continued')
            run(name, pieces[name], f'{torch.cuda.get_device_name()}, torch {torch.__version__}')
            again = False
            if '--minutes' not in pieces[name]: break # It begins anew each time


if __name__=='__main__': main()

"""Everything that wants a GPU, in pieces of less than ten minutes that resume: `make gpu`, or `python benchmarks/gpu.py`

A piece that has its result file is not run again; `--again` runs all. Without a GPU it says so and lists the pieces."""
import argparse,subprocess,sys,time
from pathlib import Path
import torch

root = Path(__file__).resolve().parents[1]
results = root/'benchmarks/results'
pieces = {
    'cuda_tests': [sys.executable, '-m', 'pytest', '-q', '-m', 'cuda', 'tests'],
    'speed': [sys.executable, 'benchmarks/speed.py', '--device', 'cuda', '--rounds', '5'],
    'digits': [sys.executable, '-m', 'adahessian_fastai', '--seeds', '3']}

def run(name, command):
    "Run one piece, and keep what it says with command, versions and hardware"
    start = time.perf_counter()
    res = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    command = ' '.join(['python', *command[1:]])
    head = f"{command}\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter()-start:.0f} s, exit status {res.returncode}\n\n"
    (results/f'gpu_{name}.txt').write_text(head+res.stdout[-20_000:]+res.stderr[-5_000:])
    print(head.strip())

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--again', action='store_true')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print('There is no CUDA device here. The pieces are:', *(f"  {k}: {' '.join(['python', *c[1:]])}" for k,c in pieces.items()), sep='\n')
        return
    for name,command in pieces.items():
        if args.again or not (results/f'gpu_{name}.txt').exists(): run(name, command)

if __name__=='__main__': main()

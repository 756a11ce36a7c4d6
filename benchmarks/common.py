"What the benchmarks share: interleaved medians, and peak memory of a fresh process"
import os, platform, statistics, subprocess, sys, time

import timm, torch

def median_times(variants, repeats, clock=time.perf_counter):
    "Median seconds of each variant, all of them in turn, after one warm-up each; by the wall or by another clock"
    times = {k: [] for k in variants}
    for r in range(repeats+1):
        for k,f in variants.items():
            began = clock(); f()
            if r: times[k].append(clock()-began)
    return {k: statistics.median(v) for k,v in times.items()}

def peak(args):
    "Peak memory that the running script prints for one variant in a fresh process, MiB"
    out = subprocess.run([sys.executable, sys.argv[0], 'peak', *map(str, args)], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])

def rss():
    "Peak resident memory of this process, MiB; ru_maxrss would be that of the parent, were it larger"
    with open('/proc/self/status') as f: return next(int(l.split()[1])/1024 for l in f if l.startswith('VmHWM'))

def machine(threads):
    "One line: machine, threads, versions"
    return f'{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}, timm {timm.__version__}, OMP_WAIT_POLICY={os.environ.get("OMP_WAIT_POLICY", "unset")}'

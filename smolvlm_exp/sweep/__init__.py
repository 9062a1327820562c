"""Many runs by one command: python -m smolvlm_exp -m adapter.r=4,8,16 trainer.learning_rate=1e-5,5e-5

`grid` and `search` choose the jobs, `launcher` hands them to Hydra's launcher, `job_process` runs one in a process of
its own, and `results` and `sweep_page` report them. What a sweep saves on disk: runs/sweep_record.py.
"""

"""Many runs by one command: python -m smolvlm_exp -m adapter.r=4,8,16 trainer.learning_rate=1e-5,5e-5

`jobs` says what differs, `record` keeps what is known of a sweep on the disk, `isolation` runs one job in a process of
its own, `launch` hands jobs to Hydra's launcher, `grid` and `search` decide which jobs there are, and `outcome`,
`effects` and `page` say what came of it.
"""

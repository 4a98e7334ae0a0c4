"""What tests, benchmarks and CI share: devices by engine, the op coverage runner, the upstream test runner.

python -m torch_spiral.testing coverage --help
python -m torch_spiral.testing upstream --help
python -m torch_spiral.testing differential --help
"""

"""How the tests compile: quickly, since that takes longer there than running.

On CPU, XLA's fusion emitters take 70 % of the time to compile a gradient of a small trunk, and cutting a program into
pieces a third of the rest, and no program runs long here. A jaxlib without the older emitters ignores that option.
"""

FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
# The environment of a process that a test starts.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": FLAGS}

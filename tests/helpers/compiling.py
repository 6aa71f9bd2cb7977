"""How the tests compile: quickly, since that takes longer there than running.

XLA's fusion emitters take three quarters of the time to compile a step on CPU, for programs of which none runs long
here, and programs in several pieces another third of what is left. A jaxlib without the older emitters ignores that.
"""

FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
# The environment of a process that a test starts.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": FLAGS}

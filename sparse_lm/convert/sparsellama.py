"""ProSparse (arXiv 2402.13516): a Llama whose gate is a ReLU with a threshold, FATReLU."""

from sparse_lm.convert.family import Family

SPARSELLAMA = Family("sparsellama", "SparseLlamaForCausalLM")

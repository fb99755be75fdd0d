"""The networks. Importing them first settles how oneMKL sums: the same bits on any number of threads."""

import os

# With more threads MKL splits the inner dimension of small products and adds the parts in another order. Read at its first product;
# measured at no cost (fp32 linears of 32 x 384 to 15360 x 192, one core with AVX512).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

"""What the manifest tells somebody who has TVM's runtime and not memc."""

from __future__ import annotations

FROM_SOURCE = (
    "The library was compiled here from the C files in {folder}. For another machine compile them there, as in cc -O3"
    " -shared -fPIC -I TVM/include -I TVM_FFI/include *.c -o model.so with the headers that apache-tvm and"
    " apache-tvm-ffi bring along, and open that.\n"
)

ON_A_GPU = (
    "The library is for a GPU: open TVM's runtime library for CUDA before it, initialise its machine with the GPU and"
    " then the CPU, and keep inputs, states and parameters in the GPU's memory, where the outputs come too.\n"
)

HOW_TO_RUN = (
    "Open {path} with TVM's runtime (apache-tvm and apache-tvm-ffi in the versions that library.json names; the runtime"
    " library alone suffices) and call its function main with the inputs, states and parameters in the order of"
    " library.json, each contiguous and, but for what is fetched, beginning at a multiple of 64 bytes; parameters are"
    " in parameters.safetensors. It returns the outputs, then the next values of the states in its list returned, and"
    " writes the other states where they lie.\n"
    "positions [B,T] int64 are those of each token in its own sequence, counted from 0; -1 is padding. Position 0"
    " starts a sequence. Before the first call fill every state with its init: B is the number of sequences. keep [K]"
    " int64 lists the columns of tokens whose logits are wanted. In a state with S slots slot p holds the token at"
    " position p; keys lie 16 slots to a tile. Token ids and positions must be in range: nothing is checked. It is"
    " native code: run only what you trust."
)

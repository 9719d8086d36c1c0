"""The ops of the dialect as plain loops without a schedule, with dynamic leading sizes.

A function that writes a state among its arguments is marked opaque, so that it is fused with no other, and reads what
it writes only where the order of its blocks says which comes first: on a GPU each block is a kernel.
"""

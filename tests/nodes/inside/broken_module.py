"""broken_module.py: one module of ours cannot be imported; which nodes are left, and what the log says."""

import asyncio
import io
import json
import logging

import onestep.nodes as pack

log = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(log))
pack.MODULES = ("no_such_module", *pack.MODULES)
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
print(json.dumps({"nodes": [node.GET_SCHEMA().node_id for node in nodes], "log": log.getvalue()}))

"""The sections of rows, by name, in the order in which they are measured."""

from .context import Section
from .rows_cpu import filter_cpu, grpc_cpu, hop_cpu, mesh_cpu
from .rows_latency import grpc_latency, hop_latency, mesh_latency
from .rows_memory import bulk, idle_connections, mesh_memory
from .rows_routes import routes
from .rows_start import start

SECTIONS: dict[str, Section] = {
    "mesh-cpu": mesh_cpu,
    "mesh-latency": mesh_latency,
    "grpc-cpu": grpc_cpu,
    "grpc-latency": grpc_latency,
    "mesh-memory": mesh_memory,
    "idle": idle_connections,
    "bulk": bulk,
    "hop-cpu": hop_cpu,
    "hop-latency": hop_latency,
    "filter-cpu": filter_cpu,
    "routes": routes,
    "start": start,
}

/**
 * The two wire revisions that exist: the ratified standard, and the draft of January 2025 that early hardware was built
 * to. Only the codecs may know which one is in use.
 */
export const WIRE_REVISIONS = ['virtio-1.4', 'rfc-2025-01'] as const;

export type WireRevision = (typeof WIRE_REVISIONS)[number];

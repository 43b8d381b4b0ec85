/** The wire revisions by name. */
import { WIRE_REVISIONS, type WireRevision } from '../../virtio/revision.ts';
import { type IpsecWire, makeIpsecWire, type WireOptions } from './codec.ts';
import { rfc202501Layout } from './rfc-2025-01.ts';
import { virtio14Layout } from './virtio-1.4.ts';

const layouts = { 'virtio-1.4': virtio14Layout, 'rfc-2025-01': rfc202501Layout } as const;

export { WIRE_REVISIONS };

/** The codec of `revision`. */
export function ipsecWire(revision: WireRevision = 'virtio-1.4', options: WireOptions = {}): IpsecWire {
  return makeIpsecWire(layouts[revision], options);
}

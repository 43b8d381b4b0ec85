/**
 * Which SA is which resource object of the device: what the data path must know of IPsec, as two arrays.
 *
 * The control path fills an entry only when the object exists, and clears it before it destroys the object.
 */

/** In `resourceId`: the SA is not on the device, or is not an outbound one. Packets that name it are not sent. */
export const NOT_INLINE = 0xffffffff;

export interface SaTable {
  /** Outbound: id of the SA's object by SA handle, or `NOT_INLINE`. */
  readonly resourceId: Uint32Array;
  /** Inbound: SA handle by object id; 0 is no SA. */
  readonly handle: Uint32Array;
}

/** A table with nothing in it, of the size that the limits of the device ask for. */
export function createSaTable(handles: number, inboundLimit: number): SaTable {
  return { resourceId: new Uint32Array(handles).fill(NOT_INLINE), handle: new Uint32Array(inboundLimit) };
}

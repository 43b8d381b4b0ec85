/**
 * Which opcodes a device means by MODIFY and QUERY (Virtio 1.4, 2.12.1.4).
 *
 * The table of opcodes gives QUERY 0xb and MODIFY 0xc, the text of each command the opposite. The driver starts with the text
 * and can ask: a command 0xc that carries an object as it was created is either a QUERY, which returns it, or a MODIFY
 * that changes nothing. Not to be tried on an outbound SA: whether a modify restarts its sequence number is not said.
 */
import type { AdminQueue } from './admin.ts';
import { AdminOpcode, AdminOpcodeTable, encodeResourceCommand, ResourceType, resourceTypeName } from './admin-wire.ts';

/**
 * Finds out with an existing object and the bytes that it was created with, of which one must not be 0; sets the opcodes of
 * `admin` and says which reading the device has. Rejects as the command does when the device refuses it in both readings.
 */
export async function findObjectOpcodes(
  admin: AdminQueue,
  type: number,
  id: number,
  object: Uint8Array,
): Promise<'text' | 'table'> {
  if (type === ResourceType.NET_IPSEC_OUTB_SA) throw new RangeError('not to be tried on an outbound SA');
  if (object.every((byte) => byte === 0)) throw new RangeError('an object of zeros tells nothing');
  const { RESOURCE_OBJ_QUERY, RESOURCE_OBJ_MODIFY } = AdminOpcode;
  const data = encodeResourceCommand(admin.revision, RESOURCE_OBJ_MODIFY, { type, id, object });
  const sent = admin.command(RESOURCE_OBJ_QUERY, data, object.length, `${resourceTypeName(type)} ${id}`);
  data.fill(0);
  const result = await sent;
  // A QUERY may leave out trailing zeros; a MODIFY has no result, or one of zeros.
  const queried = result.length > 0 && object.every((byte, i) => byte === (result[i] ?? 0));
  result.fill(0);
  admin.queryOpcode = queried ? RESOURCE_OBJ_QUERY : AdminOpcodeTable.RESOURCE_OBJ_QUERY;
  admin.modifyOpcode = queried ? RESOURCE_OBJ_MODIFY : AdminOpcodeTable.RESOURCE_OBJ_MODIFY;
  return queried ? 'text' : 'table';
}

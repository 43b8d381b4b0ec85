/**
 * A device's administration queue in memory: capabilities that a test gives it, objects in maps. It refuses what a strict device
 * refuses in general (an id twice, an id that is not there); a test makes it refuse more with `fail`.
 */
import { AdminCommandError } from '../../src/errors.ts';
import { AdminOpcode, AdminStatus } from '../../src/virtio/admin-wire.ts';

export interface FakeObject {
  readonly bytes: Uint8Array;
  readonly flags: bigint;
}

export class FakeAdmin {
  readonly revision = 'virtio-1.4' as const;
  readonly capabilities = new Map<number, Uint8Array>();
  readonly driverCapabilities = new Map<number, Uint8Array>();
  /** Key: `type/id`. */
  readonly objects = new Map<string, FakeObject>();
  /** What was asked, in order: `create 0x203/0`. */
  readonly log: string[] = [];
  /** Answers a command with an error instead, when it returns one. */
  fail: (what: string) => Error | null = () => null;

  async deviceCapability(id: number): Promise<Uint8Array> {
    const bytes = this.capabilities.get(id);
    if (bytes === undefined) throw refuse(AdminOpcode.DEVICE_CAP_GET, AdminStatus.ENXIO);
    return bytes.slice();
  }

  async setDriverCapability(id: number, bytes: Uint8Array): Promise<void> {
    this.#note(`set 0x${id.toString(16)}`);
    this.driverCapabilities.set(id, bytes.slice());
  }

  async createObject(type: number, id: number, object: Uint8Array, flags = 0n): Promise<void> {
    const bytes = object.slice();
    await Promise.resolve();
    const key = this.#note(`create 0x${type.toString(16)}/${id}`);
    if (this.objects.has(key)) throw refuse(AdminOpcode.RESOURCE_OBJ_CREATE, AdminStatus.EEXIST);
    this.objects.set(key, { bytes, flags });
  }

  async modifyObject(type: number, id: number, object: Uint8Array, flags = 0n): Promise<void> {
    const bytes = object.slice();
    await Promise.resolve();
    const key = this.#note(`modify 0x${type.toString(16)}/${id}`);
    if (!this.objects.has(key)) throw refuse(AdminOpcode.RESOURCE_OBJ_MODIFY, AdminStatus.ENXIO);
    this.objects.set(key, { bytes, flags });
  }

  async queryObject(type: number, id: number, length: number): Promise<Uint8Array> {
    const key = this.#note(`query 0x${type.toString(16)}/${id}`);
    const object = this.objects.get(key);
    if (object === undefined) throw refuse(AdminOpcode.RESOURCE_OBJ_QUERY, AdminStatus.ENXIO);
    return object.bytes.slice(0, length);
  }

  async destroyObject(type: number, id: number): Promise<void> {
    await Promise.resolve();
    const key = this.#note(`destroy 0x${type.toString(16)}/${id}`);
    if (!this.objects.delete(key)) throw refuse(AdminOpcode.RESOURCE_OBJ_DESTROY, AdminStatus.ENXIO);
  }

  /** Logs a command, or throws what the test wants; returns the key of its object. */
  #note(what: string): string {
    this.log.push(what);
    const error = this.fail(what);
    if (error !== null) throw error;
    return what.slice(what.indexOf(' ') + 1);
  }
}

export function refuse(opcode: number, status: number): AdminCommandError {
  return new AdminCommandError('ADMIN_REFUSED', 'refused by the test', { opcode, status, qualifier: 0 });
}

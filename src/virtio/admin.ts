/**
 * The driver's administration commands for the function itself (Virtio 1.4, 2.12.1, the self group): lists, capabilities and
 * resource objects, as promises.
 *
 * Order of use: LIST_QUERY, LIST_USE, CAP_ID_LIST_QUERY, DEVICE_CAP_GET, DRIVER_CAP_SET, then objects. Commands that are given
 * together are sent together, and the device processes them in order. All reject as `AdminChannel.command` says. Left out: the
 * SR-IOV group, legacy-interface and device-parts commands.
 */
import type { DeviceFunction } from '../vfio/function.ts';
import { AdminChannel, type AdminChannelOptions } from './admin-channel.ts';
import {
  AdminOpcode,
  capabilityName,
  decodeIdList,
  encodeCapabilityCommand,
  encodeIdList,
  encodeResourceCommand,
  resourceTypeName,
} from './admin-wire.ts';
import type { FeatureSet } from './features.ts';
import type { WireRevision } from './revision.ts';
import type { VirtioTransport } from './transport.ts';

export interface AdminQueueOptions extends AdminChannelOptions {
  /** Layout of the object commands. Default `virtio-1.4`. */
  readonly revision?: WireRevision;
}

export class AdminQueue extends AdminChannel {
  readonly revision: WireRevision;
  /** Opcodes of MODIFY and QUERY: the standard contradicts itself; see `findObjectOpcodes` in `objects.ts`. */
  modifyOpcode: number = AdminOpcode.RESOURCE_OBJ_MODIFY;
  queryOpcode: number = AdminOpcode.RESOURCE_OBJ_QUERY;

  /** See `AdminChannel`: to be made in step 7 of the initialisation. */
  constructor(
    transport: VirtioTransport,
    fn: Pick<DeviceFunction, 'allocateDma' | 'freeDma' | 'gone'>,
    features: FeatureSet,
    options: AdminQueueOptions = {},
  ) {
    super(transport, fn, features, options);
    this.revision = options.revision ?? 'virtio-1.4';
  }

  /** LIST_QUERY (2.12.1): the opcodes that the device supports. */
  async listQuery(): Promise<number[]> {
    return decodeIdList(await this.command(AdminOpcode.LIST_QUERY, new Uint8Array(0), this.maxResult));
  }

  /** LIST_USE (2.12.1): the opcodes that the driver will use. Sent when nothing else is in flight. */
  async listUse(opcodes: Iterable<number>): Promise<void> {
    await this.command(AdminOpcode.LIST_USE, encodeIdList(opcodes), 0);
  }

  /** CAP_ID_LIST_QUERY (2.12.1.3): the capabilities that the device has. */
  async capabilityIds(): Promise<number[]> {
    return decodeIdList(await this.command(AdminOpcode.CAP_ID_LIST_QUERY, new Uint8Array(0), this.maxResult));
  }

  /** DEVICE_CAP_GET (2.12.1.3): the bytes of capability `id`, as many as the device wrote. */
  deviceCapability(id: number): Promise<Uint8Array> {
    const data = encodeCapabilityCommand(id);
    return this.command(AdminOpcode.DEVICE_CAP_GET, data, this.maxResult, `capability ${capabilityName(id)}`);
  }

  /** DRIVER_CAP_SET (2.12.1.3): what of capability `id` the driver uses. */
  async setDriverCapability(id: number, capability: Uint8Array): Promise<void> {
    const data = encodeCapabilityCommand(id, capability);
    await this.command(AdminOpcode.DRIVER_CAP_SET, data, 0, `capability ${capabilityName(id)}`);
  }

  /** RESOURCE_OBJ_CREATE (2.12.1.4). `object` may be wiped by the caller as soon as this has returned its promise. */
  createObject(type: number, id: number, object: Uint8Array, flags = 0n): Promise<void> {
    return this.#objectCommand(AdminOpcode.RESOURCE_OBJ_CREATE, type, id, flags, object);
  }

  /** RESOURCE_OBJ_MODIFY (2.12.1.4): on failure the object is as it was. */
  modifyObject(type: number, id: number, object: Uint8Array, flags = 0n): Promise<void> {
    return this.#objectCommand(this.modifyOpcode, type, id, flags, object);
  }

  /** RESOURCE_OBJ_DESTROY (2.12.1.4). */
  destroyObject(type: number, id: number): Promise<void> {
    return this.#objectCommand(AdminOpcode.RESOURCE_OBJ_DESTROY, type, id, 0n);
  }

  /**
   * RESOURCE_OBJ_QUERY (2.12.1.4): the object as the device keeps it, at most `length` bytes. The bytes of an SA contain
   * its keys: the caller wipes them.
   */
  queryObject(type: number, id: number, length: number): Promise<Uint8Array> {
    const data = encodeResourceCommand(this.revision, AdminOpcode.RESOURCE_OBJ_QUERY, { type, id });
    return this.command(this.queryOpcode, data, length, `${resourceTypeName(type)} ${id}`);
  }

  async #objectCommand(opcode: number, type: number, id: number, flags: bigint, object?: Uint8Array): Promise<void> {
    const shape = opcode === AdminOpcode.RESOURCE_OBJ_DESTROY ? opcode : AdminOpcode.RESOURCE_OBJ_CREATE;
    const data = encodeResourceCommand(this.revision, shape, { type, id, flags, ...(object && { object }) });
    const done = this.command(opcode, data, 0, `${resourceTypeName(type)} ${id}`);
    data.fill(0);
    await done;
  }
}

/** A network driver of a few lines on top of `MiniDriver`: queues 0 and 1, administration queue, headers. */
import {
  AdminOpcode,
  encodeAdminCommand,
  encodeCapabilityCommand,
  encodeIdList,
  encodeResourceCommand,
} from '../../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../../src/virtio/features.ts';
import { CommonCfgField } from '../../../src/virtio/pci-layout.ts';
import type { WireRevision } from '../../../src/virtio/revision.ts';
import {
  decodeNetHeader,
  encodeNetHeader,
  NetHeader,
  type NetHeaderLayout,
  netHeaderLayout,
} from '../../../src/virtio-net/header.ts';
import { ALL_OPCODES } from './admin.ts';
import { MiniDriver, type Ring } from './mini-driver.ts';
import '../../equality.ts';

const WRITE = 2;
const NEXT = 1;
const BUFFER = 2048;
const QUEUE = 64;

export interface Reply {
  readonly status: number;
  readonly qualifier: number;
  readonly result: Uint8Array;
  readonly length: number;
}

export interface ControlReply {
  readonly ack: number;
  readonly result: Uint8Array;
  readonly length: number;
}

export interface Received {
  readonly header: NetHeader;
  readonly frame: Uint8Array;
  readonly buffers: number;
}

export class NetDriver {
  readonly driver: MiniDriver;
  readonly features: FeatureSet;
  readonly layout: NetHeaderLayout;
  readonly revision: WireRevision;
  rx!: Ring;
  tx!: Ring;
  admin: Ring | null = null;
  readonly #buffers: number;
  readonly #size: number;
  control: Ring | null = null;
  #adminArea = 0;
  #controlArea = 0;
  #controlIndex = 2;
  #largeArea = 0;
  #nextTx = 0;

  private constructor(driver: MiniDriver, features: FeatureSet, revision: WireRevision, bufferSize: number) {
    this.driver = driver;
    this.features = features;
    this.revision = revision;
    this.layout = netHeaderLayout(features, revision);
    this.#size = bufferSize;
    this.#buffers = driver.allocate(2 * QUEUE * BUFFER);
  }

  /** Brings the function to DRIVER_OK; `ipsec` also uses all opcodes and sets all capabilities. */
  static async open(
    path: string,
    options: {
      features?: FeatureSet;
      revision?: WireRevision;
      bufferSize?: number;
      ipsec?: boolean;
      vectors?: boolean;
      /** Index of the control queue, where MQ or RSS puts it elsewhere than at 2. */
      control?: number;
    } = {},
  ): Promise<NetDriver> {
    const driver = await MiniDriver.open(path);
    const revision = options.revision ?? 'virtio-1.4';
    const base = options.features ?? FeatureSet.of(Feature.VERSION_1);
    const features = options.ipsec === true ? base.with(Feature.IPSEC, Feature.ADMIN_VQ) : base;
    const net = new NetDriver(driver, features, revision, options.bufferSize ?? BUFFER);
    if (!(await driver.negotiate(features))) throw new Error('FEATURES_OK was refused');
    if (options.vectors === true) await driver.interrupts(4);
    const vector = (v: number) => (options.vectors === true ? v : 0xffff);
    net.rx = await driver.queue(0, QUEUE, vector(1));
    net.tx = await driver.queue(1, QUEUE, vector(2));
    if (features.has(Feature.ADMIN_VQ)) {
      net.admin = await driver.queue(await driver.read(CommonCfgField.adminQueueIndex, 2), 16, vector(3));
      net.#adminArea = driver.allocate(0x4000);
    }
    const isUsual = features.has(Feature.CTRL_VQ) && !features.hasAny(Feature.MQ, Feature.RSS);
    const control = options.control ?? (isUsual ? 2 : null);
    if (control !== null) {
      net.control = await driver.queue(control, 16);
      net.#controlIndex = control;
      net.#controlArea = driver.allocate(0x4000);
    }
    if (options.vectors === true) await driver.write(0x10, 2, 0);
    await driver.driverOk();
    if (options.ipsec === true) await net.enable();
    return net;
  }

  /** Gives `n` receive buffers to the device. */
  async fill(n = QUEUE): Promise<void> {
    for (let i = 0; i < n; i++) this.post(i);
    await this.driver.notify(0);
  }

  post(i: number): void {
    this.rx.descriptor(i, this.#buffers + i * BUFFER, this.#size, WRITE);
    this.rx.offer(i);
  }

  /** Sends a frame, and waits until the device has used the buffer. */
  async send(frame: Uint8Array, header: Partial<NetHeader> = {}): Promise<void> {
    this.offer(frame, header);
    await this.driver.notify(1);
    await this.tx.wait();
  }

  /** As `send`, for packets of up to 64 KiB that the device is to segment. */
  async sendLarge(frame: Uint8Array, header: Partial<NetHeader>): Promise<void> {
    if (this.#largeArea === 0) this.#largeArea = this.driver.allocate(0x12000);
    const { memory } = this.driver;
    encodeNetHeader(this.layout, Object.assign(new NetHeader(), header), memory.u8, this.#largeArea);
    memory.u8.set(frame, this.#largeArea + this.layout.length);
    const d = this.#nextTx++ % QUEUE;
    this.tx.descriptor(d, this.#largeArea, this.layout.length + frame.length, 0);
    this.tx.offer(d);
    await this.driver.notify(1);
    await this.tx.wait();
  }

  /** Sends a control command; returns its `ack` and what stands behind it. */
  async ctrl(classNumber: number, command: number, data: readonly number[], result = 0): Promise<ControlReply> {
    const { control, driver } = this;
    if (control === null) throw new Error('no control queue');
    const at = this.#controlArea;
    const back = at + 0x2000;
    driver.memory.u8.set([classNumber, command, ...data], at);
    driver.memory.u8.fill(0xee, back, back + 1 + result);
    control.descriptor(0, at, 2 + data.length, NEXT, 1);
    control.descriptor(1, back, 1 + result, WRITE);
    control.offer(0);
    await driver.notify(this.#controlIndex);
    const { length } = await control.wait();
    return { ack: driver.memory.u8[back], result: driver.memory.u8.slice(back + 1, back + length), length };
  }

  /** Puts a frame into the transmit queue. */
  offer(frame: Uint8Array, header: Partial<NetHeader> = {}): void {
    const slot = QUEUE + (this.#nextTx % QUEUE);
    const at = this.#buffers + slot * BUFFER;
    const { memory } = this.driver;
    encodeNetHeader(this.layout, Object.assign(new NetHeader(), header), memory.u8, at);
    memory.u8.set(frame, at + this.layout.length);
    const d = this.#nextTx % QUEUE;
    this.#nextTx++;
    this.tx.descriptor(d, at, this.layout.length + frame.length, 0);
    this.tx.offer(d);
  }

  /** The next frame, put together from its buffers, which are given to the device again. */
  async receive(timeout?: number): Promise<Received> {
    const parts: number[] = [];
    let header: NetHeader | null = null;
    let left = 1;
    let buffers = 0;
    while (left-- > 0) {
      const { id, length } = await this.rx.wait(timeout);
      const at = this.#buffers + id * BUFFER;
      const bytes = this.driver.memory.u8.slice(at, at + length);
      buffers++;
      if (header === null) {
        header = new NetHeader();
        decodeNetHeader(this.layout, bytes, 0, bytes.length, header);
        left = header.numBuffers - 1;
        parts.push(...bytes.subarray(this.layout.length));
      } else {
        parts.push(...bytes);
      }
      this.post(id);
    }
    if (header === null) throw new Error('unreachable');
    return { header, frame: Uint8Array.from(parts), buffers };
  }

  /** Sends an administration command of any bytes, with room for `writable` bytes of reply. */
  async command(bytes: Uint8Array, writable: number): Promise<Reply> {
    const { memory } = this.driver;
    const ring = this.admin;
    if (ring === null) throw new Error('no administration queue');
    const reply = this.#adminArea + 0x2000;
    memory.u8.set(bytes, this.#adminArea);
    memory.u8.fill(0xee, reply, reply + 0x2000);
    if (bytes.length > 0) ring.descriptor(0, this.#adminArea, bytes.length, writable > 0 ? NEXT : 0, 1);
    if (writable > 0) ring.descriptor(bytes.length > 0 ? 1 : 0, reply, writable, WRITE);
    ring.offer(0);
    await this.driver.notify(2);
    const { length } = await ring.wait();
    const written = memory.u8.slice(reply, reply + length);
    if (memory.u8.subarray(reply + length, reply + 0x2000).some((byte) => byte !== 0xee)) {
      throw new Error('the device wrote more than it said');
    }
    return {
      status: (written[0] ?? 0) | ((written[1] ?? 0) << 8),
      qualifier: (written[2] ?? 0) | ((written[3] ?? 0) << 8),
      result: written.slice(8),
      length,
    };
  }

  async execute(opcode: number, data: Uint8Array): Promise<Reply> {
    const out = new Uint8Array(4096);
    const length = encodeAdminCommand(out, { opcode, groupType: 0, groupMemberId: 0n, data });
    return this.command(out.subarray(0, length), 1024);
  }

  async create(type: number, id: number, object: Uint8Array): Promise<void> {
    const opcode = AdminOpcode.RESOURCE_OBJ_CREATE;
    const { status } = await this.execute(opcode, encodeResourceCommand(this.revision, opcode, { type, id, object }));
    if (status !== 0) throw new Error(`CREATE ${type} ${id}: status ${status}`);
  }

  async destroy(type: number, id: number): Promise<number> {
    const opcode = AdminOpcode.RESOURCE_OBJ_DESTROY;
    return (await this.execute(opcode, encodeResourceCommand(this.revision, opcode, { type, id }))).status;
  }

  async enable(): Promise<void> {
    await this.execute(AdminOpcode.LIST_USE, encodeIdList(ALL_OPCODES));
    for (const id of [0x800, 0x801, 0x802, 0x803, 0x804]) {
      const { result } = await this.execute(AdminOpcode.DEVICE_CAP_GET, encodeCapabilityCommand(id));
      const { status } = await this.execute(AdminOpcode.DRIVER_CAP_SET, encodeCapabilityCommand(id, result));
      if (status !== 0) throw new Error(`CAP_SET ${id}: status ${status}`);
    }
  }

  close(): void {
    this.driver.close();
  }
}

/** An Ethernet frame of `length` bytes with an IPv4 UDP packet from port 1000 to port 2000. */
export function udpFrame(
  length = 100,
  change: { source?: number; destination?: number; fill?: number } = {},
): Uint8Array {
  const frame = new Uint8Array(length).fill(change.fill ?? 0x5a);
  frame.set([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
  const total = length - 14;
  frame.set([0x45, 0, total >>> 8, total, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2], 14);
  let sum = 0;
  for (let i = 14; i < 34; i += 2) sum += (frame[i] << 8) | frame[i + 1];
  sum = (sum & 0xffff) + (sum >>> 16);
  sum = ~((sum & 0xffff) + (sum >>> 16)) & 0xffff;
  frame.set([sum >>> 8, sum], 24);
  const source = change.source ?? 1000;
  const destination = change.destination ?? 2000;
  const udp = total - 20;
  frame.set([source >>> 8, source, destination >>> 8, destination, udp >>> 8, udp, 0, 0], 34);
  return frame;
}

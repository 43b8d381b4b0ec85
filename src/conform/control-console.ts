/** Control commands for checks: any class, any bytes, any room for the result (Virtio 1.4, 5.1.9.5). */
import { Ack, ControlField } from '../virtio-net/control-wire.ts';
import { Failed } from './check.ts';
import { UNTOUCHED } from './console.ts';
import type { Trace } from './driver.ts';
import type { CheckRing } from './ring.ts';
import type { Target } from './target.ts';
import type { Patience } from './time.ts';

/** Bytes of a command, and of a reply. */
const COMMAND = 2048;
const REPLY = 2048;

export interface ControlReply {
  /** What was sent, for messages: `VLAN_ADD 5`. */
  readonly name: string;
  readonly ok: boolean;
  readonly result: Uint8Array;
  /** As the device reported. */
  readonly length: number;
}

export interface ControlConsoleOptions {
  readonly patience: Patience;
  readonly log: (line: string) => void;
  readonly trace: Trace;
  readonly kick: () => void;
}

export class ControlConsole {
  readonly #target: Target;
  readonly #ring: CheckRing;
  readonly #options: ControlConsoleOptions;
  readonly #command: number;
  readonly #reply: number;

  constructor(target: Target, ring: CheckRing, options: ControlConsoleOptions) {
    this.#target = target;
    this.#ring = ring;
    this.#options = options;
    this.#command = target.allocate(COMMAND);
    this.#reply = target.allocate(REPLY);
  }

  /** Sends a command with room for `room` bytes of result, and takes what the device answers. */
  async send(name: string, classNumber: number, command: number, data: Uint8Array, room = 0): Promise<ControlReply> {
    const { u8 } = this.#target.memory;
    u8[this.#command + ControlField.class] = classNumber;
    u8[this.#command + ControlField.command] = command;
    u8.set(data, this.#command + ControlField.data);
    u8.fill(UNTOUCHED, this.#reply, this.#reply + REPLY);
    const writable = Ack.size + room;
    const commandLength = ControlField.data + data.length;
    this.#options.trace('sent', name, u8.slice(this.#command, this.#command + commandLength));
    this.#ring.offer({ at: this.#command, length: commandLength }, { at: this.#reply, length: writable, write: true });
    this.#options.kick();
    const { length } = await this.#ring.wait(this.#options.patience);
    if (length > writable) throw new Failed(`${name}: used length ${length} of a buffer of ${writable} bytes`);
    this.#options.trace('came', name, u8.slice(this.#reply, this.#reply + length));
    const ack = u8[this.#reply];
    if (ack !== Ack.OK && ack !== Ack.ERR) throw new Failed(`${name}: ack is ${ack}`);
    const ok = ack === Ack.OK;
    this.#options.log(`${name} → ${ok ? 'OK' : 'ERR'}${length > Ack.size ? `, ${length - Ack.size} bytes` : ''}`);
    return { name, ok, result: u8.slice(this.#reply + Ack.size, this.#reply + Math.max(length, Ack.size)), length };
  }

  /** Sends a command that must succeed; returns its result. Throws `Failed` when it does not. */
  async done(name: string, classNumber: number, command: number, data: Uint8Array, room = 0): Promise<Uint8Array> {
    const { ok, result } = await this.send(name, classNumber, command, data, room);
    if (!ok) throw new Failed(`${name}: expected OK, came ERR`);
    return result;
  }
}

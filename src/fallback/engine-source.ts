/** Which engine works for a `SoftwareIpsec` or an `InlineCrypto`: the package's own choice, or engines that the caller made. */
import { IpsecError } from '../errors.ts';
import type { MappedMemory } from '../sys/memory.ts';
import type { CryptoEngine, EngineName, Transform } from './engines/engine.ts';
import { Engines } from './engines/select.ts';

/**
 * `auto` picks per transform the fastest that can do it. A list: engines that the caller made for the pool's memory and
 * closes, tried in order.
 */
export type EngineOption = 'auto' | EngineName | readonly CryptoEngine[];

export class EngineSource {
  readonly #list: readonly CryptoEngine[] | undefined;
  readonly #engines: Engines | undefined;

  constructor(memory: MappedMemory, option: EngineOption) {
    if (typeof option === 'string') this.#engines = new Engines(memory, option);
    else this.#list = option;
  }

  /** Throws `IpsecError` `TRANSFORM_UNSUPPORTED`, or what `Engines.select` throws. */
  select(transform: Transform): CryptoEngine {
    if (this.#engines !== undefined) return this.#engines.select(transform).engine;
    const found = this.#list?.find((candidate) => candidate.supports(transform));
    if (found === undefined) throw new IpsecError('TRANSFORM_UNSUPPORTED', `no engine can do ${transform.id}`);
    return found;
  }

  /** Closes the engines that it made itself. */
  close(): void {
    this.#engines?.close();
  }
}

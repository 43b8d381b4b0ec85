/**
 * Who is told what happens to SAs. Events reach listeners after the burst in which they arose, so that a listener may do anything.
 */
import type { SaEvents, SaNotification } from './ipsec.ts';
import type { SaRegistry } from './sa-registry.ts';

export class SaListeners {
  readonly #registry: SaRegistry;
  readonly #listeners = new Set<(notification: SaNotification) => void>();
  readonly #closeListeners = new Set<() => void>();

  constructor(registry: SaRegistry) {
    this.#registry = registry;
  }

  /** As `Ipsec.onSaEvent`. */
  onSaEvent(listener: (notification: SaNotification) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** As `Ipsec.onClose`. */
  onClose(listener: () => void): () => void {
    this.#closeListeners.add(listener);
    return () => this.#closeListeners.delete(listener);
  }

  /** Tells those of the SA, and those of all, unless it is over. */
  tell<E extends keyof SaEvents>(handle: number, event: E, args: SaEvents[E]): void {
    const managed = this.#registry.get(handle);
    if (managed === undefined) return;
    queueMicrotask(() => {
      managed.tell(event, args);
      for (const listener of this.#listeners) listener({ sa: managed, event, limit: args[0] ?? null });
    });
  }

  /** All SAs are over. */
  closed(): void {
    for (const listener of [...this.#closeListeners]) listener();
  }
}
